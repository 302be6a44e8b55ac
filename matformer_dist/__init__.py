"""Train one nested MatFormer language model on a cluster; take many smaller ones out of it."""
