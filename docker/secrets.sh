#!/usr/bin/env bash
# Makes the secrets of compose.yaml that are not there yet, in docker/secrets/, which git ignores: a key for the API and
# Grafana's password, 24 random bytes each. To use your own, write them there before.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p secrets
# A secret's file is shown to a container with its owner and mode, and the users in there are not yours. So the files can be
# read by all, and the folder, which the container does not pass through, by you alone.
chmod 700 secrets
for name in api_key grafana_admin_password; do
    file=secrets/$name
    if [ -s "$file" ]; then
        echo "docker/$file is there already"
    else
        head -c 24 /dev/urandom | base64 | tr -d '\n' > "$file"
        chmod 444 "$file"
        echo "docker/$file: made"
    fi
done
