"""The steps of ``benchmarks/gpu_first_contact.sh``, each a process.

``record`` keeps the one JSON and needs nothing installed; ``facts``, ``library``, ``trials``,
``verify``, ``engine`` and ``sanitizer`` are steps; ``calls`` calls the ops for them. Steps that
measure are the benchmarks of the parent folder.
"""
