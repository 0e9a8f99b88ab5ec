"""Triton implementations (source `triton`), one op a file; the same source serves NVIDIA and AMD.

`REQUIRES` tells the catalog that no module of this folder can be imported without that package: where it is missing,
every op file is still listed, with the reason. Modules that begin with an underscore are helpers, not ops.
"""

REQUIRES = "triton"
HOW_TO_INSTALL = "pip install 'weftrain[triton]'"
