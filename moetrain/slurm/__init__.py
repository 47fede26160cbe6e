"""Slurm's side of a run: submit, plan, preflight, train, requeue.

``submit`` runs where the user sits, ``job`` is the batch script's one process (no torch), ``plan`` and
``preflight`` are steps that it starts. ``launch/slurm/`` has the scripts.
"""
