"""Models hold what is true: values in, values out. They import neither tasks nor flows, neither Prefect nor fsspec."""
