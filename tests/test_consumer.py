"""The docs' examples pass strict mypy, and a misspelt name in one is found."""

import pytest

from tests.consumer import check

RIGHT = """# A page

```python
from lumix_dali import LUMixLoss, create_loader
loader = create_loader(root, batch_size=8, mixup_alpha=0.8, mode="elem")
for images, target in loader:
    print(LUMixLoss(r_r=0.4)(model(images), target))
```
"""


@pytest.mark.slow
def test_misspelt_names_are_found(tmp_path):
    faults = {"LUMixLoss, create": "LUMixLos, create", "mixup_alpha=": "mixup_alfa=", '"elem"': '"elm"', "r_r=": "rr="}
    pages = []
    for number, (right, wrong) in enumerate(faults.items()):
        pages.append(tmp_path / f"page{number}.md")
        pages[-1].write_text(RIGHT.replace(right, wrong))
    status, output = check(pages)
    assert status == 1
    assert {page.stem for page in pages if f"{page.stem}_line_4.py" in output} == {page.stem for page in pages}, output
    pages[0].write_text(RIGHT)
    assert check(pages[:1]) == (0, "Success: no issues found in 1 source file\n")
