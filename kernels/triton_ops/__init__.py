"""Triton implementations (source `triton`), one op a file; the same source serves NVIDIA and AMD.

`why_not` tells the catalog that no module of this folder can be imported, and why: every op file is then still listed,
with that reason. Modules that begin with an underscore are helpers, not ops.
"""

from weftrain.kernels.triton_version import why_not_triton as why_not

__all__ = ["why_not"]
