"""What a test wants to be different in every process of an engine: on the path, Python imports this when it starts."""

import os

exec(os.environ.get("TEST_EVERY_PROCESS", ""))
