"""Semantic segmentation by Segmenter (arXiv 2105.05633), Table 4 of LUMix: `python -m pipelines.segment`."""
