# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A service for many clients: engine.py owns the models, app.py speaks HTTP."""
