# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of every reader: ``corpus`` makes sound files, ``mutate`` damages them, ``readers`` says how each kind is
read and what has to hold, ``run`` reads mutants in processes of their own and judges what comes of it.

``make fuzz`` starts it; docs/reliability.md says what is promised.
"""
