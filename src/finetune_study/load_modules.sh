# Sourced with the names of environment modules: loads them, in a batch shell as well, which has often read no profile.
# What initialises the `module` command trips over `set -eu`; the run's own exit status is the last one, so it is off.
set +eu
names=("$@")
set --
if ! type module > /dev/null 2>&1; then
    for file in "$LMOD_PKG/init/bash" "$MODULESHOME/init/bash" \
        /etc/profile.d/{modules,lmod,z00_lmod}.sh \
        /usr/share/{lmod/lmod,modules,Modules}/init/bash; do
        # shellcheck disable=SC1090
        [ -r "$file" ] && . "$file" && break
    done
fi
if type module > /dev/null 2>&1; then
    module load "${names[@]}"
else
    echo "finetune-study: $(hostname) has no \`module\` command, to load ${names[*]}; see hardware.<name>.software" >&2
    false
fi
