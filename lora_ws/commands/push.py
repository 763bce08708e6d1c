"""`lora-ws push`: a classifier to the Hub."""

from rich.console import Console

from lora_ws.bundle import Bundle


def push(
    bundle: str,
    /,
    *,
    repo_id: str,
    private: bool = False,
    allow_classes: tuple[str, ...] = (),
) -> None:
    """Upload a trained classifier to the Hub with a model card, and print the commit to pin.

    Args:
        bundle: folder of a bundle, as written by `lora-ws train`, or the name of a shipped one
        repo_id: owner/name on the Hub; created if it does not exist
        private: make a new repository private
        allow_classes: dotted paths of representations and networks outside this library that the
            bundle may use
    """
    read = Bundle.from_pretrained(bundle, allow_classes=allow_classes)
    commit = read.push_to_hub(repo_id, private=private)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{repo_id} is at {commit}")
    console.print(f"lora-ws predict my_lora.safetensors --model {repo_id} --revision {commit}")
