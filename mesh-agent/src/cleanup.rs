//! `mesh-agent cleanup`: the reconcilers once more with an empty wish, and the few things they do not keep.
//!
//! Taken away is what bears our mark: routes by protocol number and table, rules by priority and protocol
//! number, addresses of our devices, peers and keys of the WireGuard devices, the nftables table, BPF
//! programs and pins, changed sysctls, sockets, the announcement. Pods' interfaces go only when asked, since
//! their pods may still run. A kernel WireGuard device of ours goes; a TUN is mesh-datapath's while that runs, and the
//! persistent one that a stopped datapath left is taken away.

use std::io;
use std::path::{Path, PathBuf};

use keyservice::publish::Publish as _;
use keyservice::publish::directory::DirectoryPublisher;
use mesh_api::defaults;

use crate::config::AgentConfig;
use crate::desired::Desired;
use crate::own;
use crate::reconcile::netlink::{Netlink, settle};
use crate::reconcile::{ReconcileError, Reconciler};
use crate::state::StateDir;

/// What to take away besides.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The host's ends of pods' interfaces, and with them the pods' own.
    pub pods: bool,
    /// Key, journal and everything else in the state directory: this node will be another one.
    pub purge: bool,
}

/// Takes everything away. Gives the number of changes and what could not be taken; one failure stops
/// nothing else.
pub async fn cleanup(
    config: &AgentConfig,
    state: StateDir,
    mut reconcilers: Vec<Box<dyn Reconciler>>,
    netlink: &Netlink,
    options: Options,
) -> (u64, Vec<ReconcileError>) {
    let mut operations = 0;
    let mut errors = Vec::new();
    let nothing = Desired { prune: true, ..Desired::default() };
    // The other way round than when they build: policy is the last to go.
    reconcilers.sort_by_key(|reconciler| std::cmp::Reverse(reconciler.stage()));
    for reconciler in &mut reconcilers {
        match reconciler.reconcile(&nothing).await {
            Ok(report) => {
                operations += report.operations;
                errors.extend(report.errors);
            }
            Err(error) => errors.push(error),
        }
    }
    drop(reconcilers);
    let mut record = |outcome: Result<u64, ReconcileError>| match outcome {
        Ok(done) => operations += done,
        Err(error) => errors.push(error),
    };
    if options.pods {
        record(remove_links(netlink, own::is_veth).await);
    }
    record(remove_links(netlink, |name| own::is_device(name) && !is_attended(name)).await);
    record(remove_pins(Path::new(defaults::BPF_DIR)));
    record(withdraw(&config.manifests, &config.node_name));
    for socket in [defaults::CNI_SOCKET, defaults::CONTROL_SOCKET, defaults::STATUS_SOCKET] {
        record(remove_file(&config.run_dir.join(socket)));
    }
    if options.purge {
        let root = state.root().to_owned();
        record(state.purge().map(|()| 1).map_err(|error| ReconcileError::new(root.display(), error)));
    }
    (operations, errors)
}

async fn remove_links(netlink: &Netlink, chosen: impl Fn(&str) -> bool) -> Result<u64, ReconcileError> {
    let mut removed = 0;
    for (name, link) in netlink.links().await?.iter().filter(|(name, _)| chosen(name)) {
        let request = netlink.handle().link().del(link.index);
        settle(request.execute().await, &[libc::ENODEV], format_args!("link {name}"))?;
        removed += 1;
    }
    Ok(removed)
}

/// Whether a datapath answers for the device.
fn is_attended(device: &str) -> bool {
    let socket = Path::new(defaults::UAPI_DIR).join(format!("{device}.sock"));
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

fn remove_pins(directory: &Path) -> Result<u64, ReconcileError> {
    if !directory.exists() {
        return Ok(0);
    }
    let removed = ebpf_policy::Enforcer::cleanup(directory);
    removed.map(|()| 1).map_err(|error| ReconcileError::new(directory.display(), error))
}

fn withdraw(manifests: &Path, node: &str) -> Result<u64, ReconcileError> {
    if !manifests.exists() {
        return Ok(0);
    }
    let withdrawn = DirectoryPublisher::new(PathBuf::from(manifests)).withdraw(node);
    withdrawn
        .map(|published| u64::from(published == keyservice::publish::Published::Changed))
        .map_err(|error| ReconcileError::new(format_args!("announcement of {node}"), error))
}

fn remove_file(path: &Path) -> Result<u64, ReconcileError> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(1),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(ReconcileError::new(path.display(), error)),
    }
}
