# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many rows: read from files as users have them, put through a worker, written as Parquet so that a job that is killed
goes on."""
