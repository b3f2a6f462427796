"""The ranks of one tensor-parallel worker: their parts of the model, and the leader whom the others follow."""
