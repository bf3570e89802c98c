"""Serves checkpoints: a page to draw on, OpenAI's chat interface, volume jobs, and a subset of MONAI Label's.

COMMAND
    python -m medplib_jax.serve --checkpoint runs/demo/stage_IV [--quantize int8] [--port 8000] [--host 127.0.0.1]

Only this machine can reach it unless --host says otherwise. Then --key is needed: a file with a key per line.
Not a medical device.
"""

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path

STORE = "~/.cache/medplib_jax/serve"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, action="append", help="workdir of a training run; several side by side"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--key", metavar="FILE", help="a key per line; every route but /healthz asks for one")
    parser.add_argument(
        "--quantize",
        choices=("int8", "kv", "int8+kv", "w8a8", "w8a8+kv"),
        default="",
        help="8 bits: weights (int8), these and activations (w8a8), KV cache (kv)",
    )
    parser.add_argument("--slots", type=int, default=8, help="answers in the making")
    parser.add_argument("--queue", type=int, default=64, help="questions that may wait")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--mask-threshold", type=float)
    parser.add_argument("--open", action="store_true", help="open a browser when the model is loaded")
    parser.add_argument("--structures", default="", metavar="A;B;...", help="what MONAI Label's clients look for")
    parser.add_argument("--dicomweb", metavar="URL", help="where MONAI Label's clients name series, as Orthanc's")
    parser.add_argument("--examples", metavar="DIR|PATTERN", help="pictures that the page offers")
    parser.add_argument("--store", metavar="DIR", help=f"uploaded scans and jobs, by default in {STORE}/PORT")
    parser.add_argument("--keep-hours", type=float, default=24.0, help="after which unused scans and jobs are removed")
    parser.add_argument("--keep-gb", type=float, default=32.0, help="of scans and jobs in all")
    arguments = parser.parse_args()
    arguments.store = arguments.store or os.path.join(os.path.expanduser(STORE), str(arguments.port))
    try:
        import uvicorn

        from medplib_jax.parallel.lock import folder_lock
        from medplib_jax.serve.start import build
    except ImportError as error:
        sys.exit(f"error: {error}; install medplib_jax[serve]")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.ExitStack() as held:
        try:
            keys = Path(arguments.key).read_text().split() if arguments.key else []
            if arguments.key and not keys:
                raise ValueError(f"{arguments.key}: expected a key per line, found none")
            if arguments.host not in LOOPBACK and not keys:
                raise ValueError(f"--host {arguments.host} opens the server to other machines: give --key FILE")
            held.enter_context(folder_lock(Path(arguments.store) / "lock"))
            app = build(arguments, keys, [*LOOPBACK, "[::1]"] if arguments.host in LOOPBACK else ["*"])
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        print(f"http://{arguments.host}:{arguments.port}/", file=sys.stderr)
        uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", timeout_graceful_shutdown=40)


if __name__ == "__main__":
    main()
