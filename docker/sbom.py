"""Add the JavaScript that we serve to an SBOM of Python packages: sbom.py SBOM.json. `make audit` runs it."""

import json
import re
import sys
from pathlib import Path

SWAGGER = Path(__file__).parents[1] / "service" / "swagger"


def swagger_ui() -> dict[str, object]:
    """Swagger UI as a component of CycloneDX, by the note beside it."""
    note = (SWAGGER / "README.txt").read_text("utf-8")
    [version] = re.findall(r"swagger-ui-dist (\d+\.\d+\.\d+)", note)
    purl = f"pkg:npm/swagger-ui-dist@{version}"
    files = re.findall(r"^([0-9a-f]{64})  (\S+)$", note, re.MULTILINE)
    return {
        "type": "library",
        "bom-ref": purl,
        "name": "swagger-ui-dist",
        "version": version,
        "purl": purl,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "components": [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for digest, name in files
        ],
    }


def main(path: Path) -> None:
    """Rewrite the file."""
    sbom = json.loads(path.read_text("utf-8"))
    sbom["components"].append(swagger_ui())
    path.write_text(json.dumps(sbom, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
