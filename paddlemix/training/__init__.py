# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning: images and texts to token ids, rows of them with their labels, and the loop."""
