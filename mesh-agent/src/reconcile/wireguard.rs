//! Keys, peers and allowed IPs of the WireGuard devices.
//!
//! A running device is taken over without touching it: only what differs is written, allowed IPs one by
//! one, and an endpoint only when the desired one changes, so that a peer that roamed stays where it is. Of preshared
//! keys a device tells only whether there is one, so they are written again after every start; sessions live on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use ipnet::IpNet;
use keyservice::{PresharedKey, PublicKey};
use mesh_uapi::{Device, Op, Peer, PeerUpdate};

use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Datapath, Desired, WireguardDevice, WireguardPeer};
use crate::wireguard::{DatapathError, Datapaths, KeyRing, Live};

/// WireGuard's REJECT_AFTER_TIME (whitepaper section 6.1): an older session carries nothing.
const REJECT_AFTER: Duration = Duration::from_secs(180);

/// Between two handshakes begun with a peer that [`WireguardPeer::connect`] is for; the device repeats the first ones.
const CONNECT_EVERY: Duration = Duration::from_secs(5);

/// The desired endpoints as they were last written (or taken over), by peer.
pub type Endpoints = BTreeMap<PublicKey, SocketAddr>;

/// What the preshared keys on a device were made from, by peer: our key, and the version of its secret.
pub type Written = BTreeMap<PublicKey, (PublicKey, u64)>;

/// What to change on a device whose key is right or in `keys`. `endpoints` is what was last written.
pub fn diff(
    actual: &Device,
    desired: &WireguardDevice,
    prune: bool,
    endpoints: &Endpoints,
    keys: &KeyRing,
    now: SystemTime,
) -> Vec<Op> {
    let mut ops = Vec::new();
    if actual.public_key != Some(desired.public_key) {
        ops.extend(keys.get(&desired.public_key).map(Op::SetPrivateKey));
    }
    if actual.listen_port != desired.listen_port {
        ops.push(Op::SetListenPort(desired.listen_port));
    }
    if actual.fwmark != desired.fwmark {
        ops.push(Op::SetFwmark(desired.fwmark));
    }
    let owned: BTreeSet<IpNet> = desired.peers.values().flat_map(|peer| &peer.allowed_ips).copied().collect();
    for (key, wish) in &desired.peers {
        let preshared = || match desired.preshared {
            true => keys.preshared(&desired.public_key, key),
            false => Some(no_preshared_key()),
        };
        let update = match actual.peers.get(key) {
            None => Some(addition(wish, desired.preshared.then(preshared).flatten())),
            Some(peer) => {
                let preshared = (peer.has_preshared_key != desired.preshared).then(preshared).flatten();
                change(peer, wish, preshared, prune, &owned, endpoints.get(key), now)
            }
        };
        ops.extend(update.map(|update| Op::SetPeer(*key, update)));
    }
    if prune {
        // Last, so that a prefix of theirs that moved has its new owner already.
        let gone = actual.peers.keys().filter(|key| !desired.peers.contains_key(*key));
        ops.extend(gone.map(|key| Op::RemovePeer(*key)));
    }
    ops
}

fn addition(wish: &WireguardPeer, preshared_key: Option<PresharedKey>) -> PeerUpdate {
    PeerUpdate {
        preshared_key,
        endpoint: wish.endpoint,
        persistent_keepalive: Some(wish.persistent_keepalive),
        add_allowed_ips: wish.allowed_ips.clone(),
        initiate: wish.connect && wish.endpoint.is_some(),
        ..PeerUpdate::default()
    }
}

/// The change to a peer that is there; `None` for none.
fn change(
    peer: &Peer,
    wish: &WireguardPeer,
    preshared_key: Option<PresharedKey>,
    prune: bool,
    owned: &BTreeSet<IpNet>,
    written: Option<&SocketAddr>,
    now: SystemTime,
) -> Option<PeerUpdate> {
    let stale = peer.allowed_ips.difference(&wish.allowed_ips);
    let update = PeerUpdate {
        update_only: true,
        preshared_key,
        endpoint: wish
            .endpoint
            .filter(|to| !(wish.learned && is_live(peer, now)) && writes_endpoint(peer, *to, written, now)),
        persistent_keepalive: (peer.persistent_keepalive != wish.persistent_keepalive)
            .then_some(wish.persistent_keepalive),
        add_allowed_ips: wish.allowed_ips.difference(&peer.allowed_ips).copied().collect(),
        // What another peer is to own moves there by being added: never without an owner in between.
        remove_allowed_ips: stale.filter(|prefix| prune && !owned.contains(*prefix)).copied().collect(),
        replace_allowed_ips: false,
        initiate: false,
    };
    let empty = update.preshared_key.is_none()
        && update.endpoint.is_none()
        && update.persistent_keepalive.is_none()
        && update.add_allowed_ips.is_empty()
        && update.remove_allowed_ips.is_empty();
    (!empty).then_some(update)
}

/// Takes a preshared key away.
fn no_preshared_key() -> PresharedKey {
    PresharedKey::from_bytes([0; 32])
}

/// Preshared keys that are there and may be other ones, beside [`diff`]: `written` is which of our keys and of its
/// secrets they were last made from, and `version` which it is now.
pub fn rewrites(
    actual: &Device,
    desired: &WireguardDevice,
    written: &Written,
    version: Option<u64>,
    keys: &KeyRing,
) -> Vec<Op> {
    let Some(version) = version.filter(|_| desired.preshared) else { return Vec::new() };
    let present = (desired.public_key, version);
    let stale = desired.peers.keys().filter(|key| {
        actual.peers.get(*key).is_some_and(|peer| peer.has_preshared_key)
            && written.get(*key) != Some(&present)
    });
    let rewrite = |key: &PublicKey| {
        let preshared_key = Some(keys.preshared(&desired.public_key, key)?);
        Some(Op::SetPeer(*key, PeerUpdate { update_only: true, preshared_key, ..PeerUpdate::default() }))
    };
    stale.filter_map(rewrite).collect()
}

/// The peers with which a session is wanted and none was made lately. `begun` is when one was last asked for.
pub fn connections(
    actual: &Device,
    desired: &WireguardDevice,
    begun: &BTreeMap<PublicKey, SystemTime>,
    now: SystemTime,
) -> Vec<PublicKey> {
    let lately = |at: &SystemTime| now.duration_since(*at).is_ok_and(|age| age < CONNECT_EVERY);
    let due = desired.peers.iter().filter(|(key, wish)| {
        wish.connect
            && actual.peers.get(*key).is_some_and(|peer| {
                let reachable = wish.endpoint.is_some() || peer.endpoint.is_some();
                reachable && !peer.last_handshake.as_ref().is_some_and(lately)
            })
            && !begun.get(*key).is_some_and(lately)
    });
    due.map(|(key, _)| *key).collect()
}

/// What to do for peers that are to be tried afresh, beside [`diff`]: the desired endpoint again if the one in use
/// failed, and a handshake. `tried` is the newest attempt carried out.
pub fn retries(actual: &Device, desired: &WireguardDevice, tried: &BTreeMap<PublicKey, u64>) -> Vec<Op> {
    let due = desired.peers.iter().filter_map(|(key, wish)| {
        let new = wish.reach.attempt > tried.get(key).copied().unwrap_or(0);
        Some((key, wish, actual.peers.get(key).filter(|_| new)?))
    });
    let retry = |(key, wish, peer): (&PublicKey, &WireguardPeer, &Peer)| {
        let failed = peer.endpoint.is_none_or(|at| wish.reach.failed.contains(&at));
        let update = PeerUpdate {
            update_only: true,
            endpoint: wish.endpoint.filter(|to| failed && peer.endpoint != Some(*to)),
            persistent_keepalive: Some(wish.persistent_keepalive),
            initiate: true,
            ..PeerUpdate::default()
        };
        Op::SetPeer(*key, update)
    };
    due.map(retry).collect()
}

/// Has a new device begin a handshake with those who talked through the one before.
fn initiate(ops: &mut [Op], actual: &Device, live: &BTreeSet<PublicKey>) {
    for op in ops {
        if let Op::SetPeer(key, update) = op
            && live.contains(key)
            && !actual.peers.contains_key(key)
        {
            update.initiate = update.endpoint.is_some();
        }
    }
}

fn writes_endpoint(peer: &Peer, wish: SocketAddr, written: Option<&SocketAddr>, now: SystemTime) -> bool {
    match written {
        _ if peer.endpoint == Some(wish) => false,
        _ if peer.endpoint.is_none() => true,
        Some(written) => *written != wish,
        // Found at the first pass of a new agent: a session that lives knows better where its peer is.
        None => !is_live(peer, now),
    }
}

fn is_live(peer: &Peer, now: SystemTime) -> bool {
    peer.last_handshake.is_some_and(|at| now.duration_since(at).unwrap_or_default() < REJECT_AFTER)
}

/// What to take from a device of ours that nobody wants any more: the key and every peer.
pub fn diff_unwanted(actual: &Device) -> Vec<Op> {
    let mut ops: Vec<Op> = actual.peers.keys().map(|key| Op::RemovePeer(*key)).collect();
    ops.extend(actual.public_key.map(|_| Op::ClearPrivateKey));
    ops
}

/// What counts for a device besides its wish.
#[derive(Debug, Clone, Copy)]
struct Context {
    prune: bool,
    /// Its policy is not in place.
    withheld: bool,
    /// mesh-datapath is to drive it.
    userspace: bool,
}

/// Keeps [`Desired::wireguard`].
pub struct WireguardReconciler {
    datapaths: Box<dyn Datapaths>,
    keys: KeyRing,
    endpoints: BTreeMap<String, Endpoints>,
    /// The newest attempt to reach a peer that was carried out, by device.
    tried: BTreeMap<String, BTreeMap<PublicKey, u64>>,
    live: Live,
    /// What preshared keys were last made from, by device.
    written: BTreeMap<String, Written>,
    /// When a session was last asked for, by device.
    begun: BTreeMap<String, BTreeMap<PublicKey, SystemTime>>,
}

impl WireguardReconciler {
    /// Over these devices, with the node's keys.
    pub fn new(datapaths: Box<dyn Datapaths>, keys: KeyRing) -> Self {
        Self {
            datapaths,
            keys,
            endpoints: BTreeMap::new(),
            tried: BTreeMap::new(),
            live: Live::default(),
            written: BTreeMap::new(),
            begun: BTreeMap::new(),
        }
    }

    /// Begins handshakes at once with peers of a device that was replaced, which are noted there.
    pub fn with_live(self, live: Live) -> Self {
        Self { live, ..self }
    }

    async fn keep(
        &mut self,
        name: &str,
        wish: &WireguardDevice,
        Context { prune, withheld, userspace }: Context,
        report: &mut Report,
    ) -> Result<(), ReconcileError> {
        let datapath = self.datapaths.open(name);
        let failed = |error: DatapathError| {
            let hint = match &error {
                DatapathError::Absent(_) if userspace => {
                    format!("; is mesh-datapath@{name} running?")
                }
                _ => String::new(),
            };
            ReconcileError::new(format_args!("device {name}"), format_args!("{error}{hint}"))
        };
        let actual = datapath.read().await.map_err(failed)?;
        if actual.public_key != Some(wish.public_key) && self.keys.get(&wish.public_key).is_none() {
            let message = format!("the private half of {} is not on this node", wish.public_key);
            return Err(ReconcileError::new(format_args!("device {name}"), message));
        }
        if withheld && actual.public_key.is_none() {
            // A new device. Without its policy it would let anything out of the tunnel.
            let message = "gets its key when its policy is in place";
            return Err(ReconcileError::new(format_args!("device {name}"), message));
        }
        // Read before any preshared key is made: one that changes meanwhile is made again at the next pass.
        let version = self.keys.secret_version(&wish.public_key);
        if wish.preshared && version.is_none() {
            let message = format!("the secret of {} is not on this node", wish.public_key);
            return Err(ReconcileError::new(format_args!("device {name}"), message));
        }
        let endpoints = self.endpoints.entry(name.to_owned()).or_default();
        #[allow(clippy::disallowed_methods)] // The edge: diff takes it as a value.
        let now = SystemTime::now();
        let mut ops = diff(&actual, wish, prune, endpoints, &self.keys, now);
        let tried = self.tried.entry(name.to_owned()).or_default();
        ops.extend(retries(&actual, wish, tried));
        initiate(&mut ops, &actual, &self.live.of(name));
        let written = self.written.entry(name.to_owned()).or_default();
        ops.extend(rewrites(&actual, wish, written, version, &self.keys));
        let begun = self.begun.entry(name.to_owned()).or_default();
        let connect = connections(&actual, wish, begun, now);
        let initiate = PeerUpdate { update_only: true, initiate: true, ..PeerUpdate::default() };
        ops.extend(connect.iter().map(|key| Op::SetPeer(*key, initiate.clone())));
        let count = ops.len() as u64;
        if count > 0 {
            datapath.apply(ops).await.map_err(failed)?;
            report.operations += count;
        }
        self.live.forget(name);
        *tried = wish.peers.iter().map(|(key, peer)| (*key, peer.reach.attempt)).collect();
        *written = version
            .filter(|_| wish.preshared)
            .map(|version| wish.peers.keys().map(|key| (*key, (wish.public_key, version))).collect())
            .unwrap_or_default();
        begun.retain(|key, _| wish.peers.contains_key(key));
        let added = wish.peers.iter().filter(|(key, peer)| peer.connect && !actual.peers.contains_key(*key));
        begun.extend(connect.into_iter().chain(added.map(|(key, _)| *key)).map(|key| (key, now)));
        *endpoints = wish.peers.iter().filter_map(|(key, peer)| peer.endpoint.map(|to| (*key, to))).collect();
        Ok(())
    }

    async fn strip(
        &mut self,
        name: &str,
        desired: &Desired,
        report: &mut Report,
    ) -> Result<(), ReconcileError> {
        self.endpoints.remove(name);
        self.tried.remove(name);
        self.written.remove(name);
        self.begun.remove(name);
        let datapath = self.datapaths.open(name);
        let failed = |error: DatapathError| ReconcileError::new(format_args!("device {name}"), error);
        let ops = match datapath.read().await {
            Ok(actual) => {
                let mut ops = diff_unwanted(&actual);
                // A device that nobody needs must not be in the way of one that somebody does.
                if desired.wireguard.values().any(|wish| wish.listen_port == actual.listen_port) {
                    ops.push(Op::SetListenPort(0));
                }
                ops
            }
            // A dead datapath has taken its key and peers along.
            Err(DatapathError::Absent(_)) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        let count = ops.len() as u64;
        if count > 0 {
            datapath.apply(ops).await.map_err(failed)?;
        }
        report.operations += count;
        Ok(())
    }
}

impl Reconciler for WireguardReconciler {
    fn name(&self) -> &'static str {
        "wireguard"
    }

    fn stage(&self) -> Stage {
        Stage::Wireguard
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let mut report = Report::default();
            for (name, wish) in &desired.wireguard {
                let context = Context {
                    prune: desired.prune,
                    withheld: desired.withhold.contains(name),
                    userspace: desired.datapath == Datapath::Userspace,
                };
                if let Err(error) = self.keep(name, wish, context, &mut report).await {
                    report.errors.push(error);
                }
            }
            if desired.prune {
                let unwanted = self.datapaths.names();
                for name in unwanted.iter().filter(|name| !desired.wireguard.contains_key(*name)) {
                    if let Err(error) = self.strip(name, desired, &mut report).await {
                        report.errors.push(error);
                    }
                }
            }
            Ok(report)
        })
    }
}

#[cfg(test)]
mod tests;
