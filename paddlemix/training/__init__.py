# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning: prepared data to rows of ids and labels, and the training loop."""
