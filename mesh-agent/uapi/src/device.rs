//! A WireGuard device as everyone sees it: no secret in it, so it can be printed and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use keyservice::{PresharedKey, PrivateKey, PublicKey};

/// What `get=1` tells, with the secrets dropped while parsing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    /// The public half of the device's private key; `None` before one is set.
    pub public_key: Option<PublicKey>,
    /// UDP port; 0 before one is bound.
    pub listen_port: u16,
    /// SO_MARK on its sockets; 0 for none.
    pub fwmark: u32,
    /// The peers by public key.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// One peer of a [`Device`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    /// Whether a preshared key is set.
    pub has_preshared_key: bool,
    /// Where its last authenticated packet came from, or what was configured.
    pub endpoint: Option<SocketAddr>,
    /// Prefixes it may send from and is sent to.
    pub allowed_ips: BTreeSet<IpNet>,
    /// Seconds between keepalives; 0 for off.
    pub persistent_keepalive: u16,
    /// When the last handshake completed; `None` for never.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received, authenticated.
    pub rx_bytes: u64,
    /// Bytes sent, handshakes and keepalives included.
    pub tx_bytes: u64,
}

/// One change to a device. A list of them is one `set=1` request, applied in order.
#[derive(Debug, Clone)]
pub enum Op {
    /// `private_key=`: also forgets all sessions when it differs.
    SetPrivateKey(PrivateKey),
    /// `private_key=` of all zeros: the device has no key and talks to nobody.
    ClearPrivateKey,
    /// `replace_peers=true`: removes every peer (what `wg setconf` sends; our agent never does).
    RemoveAllPeers,
    /// `listen_port=`
    SetListenPort(u16),
    /// `fwmark=`
    SetFwmark(u32),
    /// Adds the peer or changes the named fields of it; an allowed IP that another peer holds moves
    /// here atomically.
    SetPeer(PublicKey, PeerUpdate),
    /// `remove=true`
    RemovePeer(PublicKey),
}

/// The fields of [`Op::SetPeer`] to change; `None` and empty leave as is.
#[derive(Debug, Clone, Default)]
pub struct PeerUpdate {
    /// Only an existing peer is changed (`update_only=true`).
    pub update_only: bool,
    /// `preshared_key=`; all zero removes it.
    pub preshared_key: Option<PresharedKey>,
    /// `endpoint=`; written only when the desired one changed, so that a roamed one survives.
    pub endpoint: Option<SocketAddr>,
    /// `persistent_keepalive_interval=`, seconds.
    pub persistent_keepalive: Option<u16>,
    /// `allowed_ip=` lines to add.
    pub add_allowed_ips: BTreeSet<IpNet>,
    /// `allowed_ip=-` lines to take away.
    pub remove_allowed_ips: BTreeSet<IpNet>,
    /// `replace_allowed_ips=true` before the additions (what `wg set` sends; our agent never does).
    pub replace_allowed_ips: bool,
    /// `initiate=true`: starts a handshake now, the old session serving until the new one is there. An extension
    /// of mesh-datapath's; see [`PeerUpdate::in_plain_uapi`] for devices without it.
    pub initiate: bool,
}

impl PeerUpdate {
    /// The same for a device that does not know `initiate`: a persistent keepalive that is switched on is sent at
    /// once, and starts a handshake where there is no session. It ends as `self` has it, off if `self` says nothing.
    pub fn in_plain_uapi(&self) -> Vec<Self> {
        if !self.initiate {
            return vec![self.clone()];
        }
        let keepalive =
            |seconds| Self { update_only: true, persistent_keepalive: Some(seconds), ..Self::default() };
        let first = Self { initiate: false, persistent_keepalive: Some(0), ..self.clone() };
        let mut all = vec![first];
        match self.persistent_keepalive {
            Some(seconds @ 1..) => all.push(keepalive(seconds)),
            _ => all.extend([keepalive(u16::MAX), keepalive(0)]),
        }
        all
    }
}
