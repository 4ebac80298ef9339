//! Giving up what is not needed after set-up.

use caps::{CapSet, Capability, CapsHashSet};

/// What the running device needs: to set SO_MARK when the fwmark changes, and to bind a port below 1024 when
/// the listen port does.
pub const KEPT: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_BIND_SERVICE];

/// Keeps [`KEPT`] (as far as there) and forbids gaining any. Must be called before any thread is started:
/// capabilities are a thread's.
pub fn drop_all_but_kept() -> Result<(), String> {
    let error = |what: &str| {
        let what = what.to_owned();
        move |e: caps::errors::CapsError| format!("{what}: {e}")
    };
    let permitted = caps::read(None, CapSet::Permitted).map_err(error("read capabilities"))?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|cap| permitted.contains(cap)).collect();
    caps::clear(None, CapSet::Ambient).map_err(error("clear ambient capabilities"))?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for cap in caps::read(None, CapSet::Bounding).map_err(error("read the bounding set"))? {
            if !kept.contains(&cap) {
                caps::drop(None, CapSet::Bounding, cap).map_err(error("drop from the bounding set"))?;
            }
        }
    }
    caps::clear(None, CapSet::Inheritable).map_err(error("clear inheritable capabilities"))?;
    caps::set(None, CapSet::Effective, &kept).map_err(error("set effective capabilities"))?;
    caps::set(None, CapSet::Permitted, &kept).map_err(error("set permitted capabilities"))?;
    // Its memory is full of keys.
    nix::sys::prctl::set_dumpable(false).map_err(|e| format!("PR_SET_DUMPABLE: {e}"))?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| format!("no_new_privs: {e}"))
}
