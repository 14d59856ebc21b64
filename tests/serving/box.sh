# Runs a command as a container would: a user without name or home, no capability, the root read-only, no network, a small
# /tmp. For root, inside `unshare --mount --net --pid --fork`.
#   box.sh FOLDER PREFIX PATH COMMAND ...   FOLDER comes to lie at /srv; PREFIX is that of the interpreter
set -e
folder=$1 prefix=$2 path=$3
shift 3
mount --make-rprivate /
mount --bind "$folder" /srv
case $prefix in
/root/*) # where the user may not go: the interpreter alone is shown there
    mount --bind "$prefix" /media
    mount -t tmpfs -o mode=755 tmpfs /root
    mkdir -p "$prefix"
    mount --bind /media "$prefix"
    ;;
esac
awk '{print $5}' /proc/self/mountinfo | while read -r place; do
    case $place in
    /proc* | /sys* | /dev*) ;;
    *) mount -o remount,bind,ro "$place" 2>/dev/null || true ;;
    esac
done
mount -t tmpfs -o size=64m,mode=1777,noexec,nosuid tmpfs /tmp
ip link set lo up
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i PATH="$path" "$@"
