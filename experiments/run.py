"""The main command: `python -m experiments.run defense=nlsr attack=harmful_ft model=organism`."""

from __future__ import annotations

import os
import sys

import hydra

from experiments import sweep
from experiments.configuration import CONF
from experiments.job import job, quiet_libraries
from experiments.messages import explain, is_users


def main() -> int:
    """Runs the command line; returns the exit code.

    Errors that a user can mend are one sentence on stderr; others keep their stack trace.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    quiet_libraries()
    sweep.forget()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print(
            "interrupted; what is finished is in the store, run the same command again to go on",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 1 if sweep.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
