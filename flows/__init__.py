"""Wires the folders below into one line: data -> stages -> model -> champion."""
