# SPDX-License-Identifier: Apache-2.0
"""Scans, pictures and raters' masks in files: a class per format, and each judges its own file before it is read."""
