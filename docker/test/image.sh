#!/usr/bin/env bash
# Builds a variant of the image without a Docker engine, and runs what came out: see run_image.py and run_cuda_image.py
# beside this file.
#
#   [VARIANT=cuda] docker/test/image.sh [FOLDER]
#
# Needs root, 10 GB (VARIANT=cuda: 40) in FOLDER (default: a temporary one, removed at the end; a folder that is kept makes
# the next build quick) and Debian's packages buildah, debootstrap and iproute2. The base is a debootstrap'ed bookworm (Python 3.11), the
# builder is buildah in a chroot. The settings that pip has on this machine (an index, a folder of wheels, a certificate)
# hold in the build as well. TORCH_INDEX_URL is passed on if it is set; without it, pip must find torch's CPU build by
# itself. The CUDA build is the package index's own, so folders of wheels, where a CPU build may lie, are left out then;
# about 4 GB are downloaded. The report goes to docker/test/image.txt, of the CUDA variant to image-cuda.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."

for tool in buildah debootstrap ip unshare; do
    command -v "$tool" > /dev/null || { echo "no $tool: apt-get install buildah debootstrap iproute2" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "this needs root, to make a base image and to enter the built one" >&2; exit 1; }

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work=$(realpath "$1")
else
    work=$(mktemp -d)
fi
variant=${VARIANT:-cpu}
image=localhost/pilotfish:$variant
base=localhost/bookworm:minbase
container=

# The driver vfs, which works everywhere, copies everything for each layer: with it, only whole stages are kept.
mkdir -p "$work"/probe/{lower,upper,work,mounted}
driver=vfs layers=false
if mount -t overlay overlay "$work/probe/mounted" 2> /dev/null \
    -o "lowerdir=$work/probe/lower,upperdir=$work/probe/upper,workdir=$work/probe/work"; then
    umount "$work/probe/mounted"
    driver=overlay layers=true
fi
rm -r "$work/probe"
free=$(df --block-size=1G --output=avail "$work" | tail -1)
needed=$([ "$driver" = overlay ] && echo 10 || echo 25)
[ "$variant" = cpu ] || needed=40
[ "$free" -ge "$needed" ] || { echo "$work has $free GB left, but this needs $needed" >&2; exit 1; }
buildah() { command buildah --root "$work/store" --runroot "$work/run" --storage-driver "$driver" "$@"; }
finish() {
    [ -z "$container" ] || buildah rm "$container" > /dev/null
    [ $# -gt 0 ] || rm -rf "$work"
}
trap 'finish "$@"' EXIT

if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
    echo "base: debootstrap bookworm, minbase"
    debootstrap --variant=minbase bookworm "$work/base" > "$work/debootstrap.log"
    rm -rf "$work/base/var/cache/apt/archives/"*.deb "$work/base/var/lib/apt/lists/"*
    scratch=$(buildah from scratch)
    buildah copy -q "$scratch" "$work/base" / > /dev/null
    buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$scratch"
    buildah commit -q "$scratch" "$base" > /dev/null
    buildah rm "$scratch" > /dev/null
    rm -rf "$work/base"
fi

left_out=$([ "$variant" = cpu ] || echo find-links)
python3 docker/test/pip_settings.py "$work/pip.conf" $left_out > "$work/volumes"
mapfile -t volumes < "$work/volumes"
begun=$SECONDS
echo "image: building (the log is $work/build.log)"
buildah bud --layers="$layers" --isolation chroot --format docker --tag "$image" \
    --build-arg BASE_IMAGE="$base" --build-arg VARIANT="$variant" --build-arg TORCH_INDEX_URL="${TORCH_INDEX_URL:-}" \
    --secret id=pip,src="$work/pip.conf" "${volumes[@]}" . > "$work/build.log" 2>&1 \
    || { tail -40 "$work/build.log" >&2; exit 1; }
echo "image: built in $((SECONDS - begun)) s"

container=$(buildah from "$image")
root=$(buildah mount "$container")
buildah inspect --type image "$image" > "$work/config.json"
program=run_image.py report=image.txt
[ "$variant" = cpu ] || program=run_cuda_image.py report=image-cuda.txt
python3 "docker/test/$program" "$root" "$work/config.json" "$work/pip.conf" "${volumes[@]}" | tee "docker/test/$report"
