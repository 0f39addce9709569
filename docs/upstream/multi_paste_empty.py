"""Compiles `CreateSampleDescriptors` of paste_gpu.h for the host, and asks it about a region of height 0."""

import subprocess
import tempfile
from pathlib import Path

import nvidia.dali

HEADER = Path(nvidia.dali.__file__).parent / "include/dali/kernels/imgproc/paste/paste_gpu.h"
STUBS = """
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <unordered_set>
#include <vector>
using std::vector;
template <int n> using ivec = std::array<int, n>;
template <class T> struct span {
  T *p;
  int n;
  int size() const { return n; }
  T &operator[](int i) const { return p[i]; }
};
template <int n> using TensorListShape = vector<std::array<int, n>>;
namespace paste {
template <int ndims> struct MultiPasteSampleInput {
  struct InputPatch { ivec<ndims> out_anchor, in_anchor, size; int in_idx, batch_idx; };
  vector<InputPatch> inputs;
  ivec<ndims> out_size;
  int channels;
};
}
"""
MAIN = """
int main() {  // sample 0 pastes itself, then rows 2 to 2 (none) and columns 1 to 3 of sample 1
  paste::MultiPasteSampleInput<2> sample{
      {{{0, 0}, {0, 0}, {4, 4}, 0, 0}, {{2, 1}, {2, 1}, {0, 2}, 1, 0}}, {4, 4}, 1};
  TensorListShape<3> shapes{{4, 4, 1}, {4, 4, 1}};
  vector<SampleDescriptorGPU<char, char, 2>> descs;
  vector<PatchDesc<char, 2>> patches;
  CreateSampleDescriptors<char, char, 3>(descs, patches, span<TensorListShape<3>>{&shapes, 1}, {&sample, 1});
  for (auto &p : patches)
    if (p.in_sample_idx == 1)
      printf("rows %d-%d, columns %d-%d; ", p.patch_start[0], p.patch_end[0], p.patch_start[1], p.patch_end[1]);
}
"""

text = HEADER.read_text()
structs = text[text.index("template<class InputType, int ndims>\nstruct PatchDesc") : text.index("// Could not fill")]
function = text[text.index("template <class OutputType, class InputType, int ndims>\nvoid CreateSampleDescriptors") :]
function = function[: function.index("__global__")].rpartition("template")[0]
with tempfile.TemporaryDirectory() as folder:
    source, program = Path(folder, "a.cpp"), Path(folder, "a.out")
    source.write_text(STUBS + structs + function + MAIN)
    subprocess.run(["g++", "-std=c++17", "-w", "-o", program, source], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout
raise SystemExit(f"fault: an empty region of the other sample covers {found}" if found else 0)
