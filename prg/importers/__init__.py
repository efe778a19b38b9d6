"""Importers: networks that others trained, as runs of ours."""
