"""The figures of LLM360's paper (arXiv 2312.06550), drawn from the record of a run or a release."""
