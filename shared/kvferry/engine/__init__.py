"""Runs a model: steps in, tokens out, KV in pages. Three engines, one protocol (`kvferry.schedule.step.ModelRunner`).

native/     C++ kernels on a CPU
torch/      the portable one, on CPUs and CUDA; nothing else imports torch
memory/     the twin without weights that tests and the simulation run
ranks/      one model on several ranks: who has which part, and how the others follow the leader
sampling/   from logits to tokens

choice.py says which engine runs a model, settings.py what it is made from; config.py, checkpoint.py and safetensors.py
read it. limits.py, columns.py and scoring.py are what the engines share; reference.py judges their texts.
"""
