"""Train, evaluate and keep classifiers of adapters: one training loop for every command.

Names are imported from their modules, because `run` brings Lightning, which takes seconds.
"""
