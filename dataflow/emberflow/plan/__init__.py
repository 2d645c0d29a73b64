"""SQL as a plan of relational operators, and back: `binder.bind`, `render.select`, `describe.describe`."""
