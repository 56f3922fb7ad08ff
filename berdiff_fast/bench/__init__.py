# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that check before they time: cases, what they are compared with, and one JSON per machine and run.

``berdiff-fast bench`` runs them. A case (``cases.py``) is one piece of work and several contenders that do it; each
contender has to pass the case's gate before it is timed, and contenders are timed in turns (``runner.py``), so that all
see the same clock. Rates are given as shares of ceilings measured in the same run (``ceilings.py``). ``report.py``
makes tables and a picture of the JSON; no number is written by hand.
"""
