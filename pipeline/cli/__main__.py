"""``python -m pipeline.cli``: what ``nested-ats`` runs."""

from pipeline.cli.app import main

main()
