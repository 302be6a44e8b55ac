"""What a run will need, computed from its configuration alone. No torch here.

layout         the run as all of planning sees it: weights and rows of one rank
memory         bytes of one rank, part by part
communication  collectives of a step, their number and bytes
timing         seconds of a step on a given machine
proposal       layouts that fit a number of devices and their memory
plan           the text of `matformer plan`
"""
