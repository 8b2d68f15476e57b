# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3 as a service: many requests at once, in one process."""
