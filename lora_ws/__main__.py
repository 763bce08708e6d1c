"""`python -m lora_ws` is `lora-ws`."""

from lora_ws.cli import main

raise SystemExit(main())
