"""A step of the cuda backend, simulated: kernels, collectives and memory of a device of each pipeline stage over time.

Ranks that do the same work at the same time are one: a run on 4,096 devices has as many simulated devices as it has
pipeline stages. `step.simulate` is the entry; docs/simulate-a-step.md says what is assumed, and how it was checked.
"""
