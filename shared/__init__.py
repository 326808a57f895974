"""Contracts between the stages of Mask What Matters. Importing this package loads no torch, dask or zarr."""

PRODUCT = "mask-what-matters"
