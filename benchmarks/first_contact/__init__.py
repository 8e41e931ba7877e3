"""The steps of ``benchmarks/gpu_first_contact.sh``, each a process.

``record`` keeps the one JSON and needs nothing installed; ``facts``, ``library``, ``verify``,
``engine`` and ``sanitizer`` are steps; ``calls`` and ``large`` call the ops for them. Steps that
measure are the benchmarks of the parent folder.
"""
