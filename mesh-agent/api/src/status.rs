//! `GET /v1/status` and friends: what the agent knows, with no secret in it.
//!
//! Paths: `/v1/status` → [`Status`]; `/v1/peers` → list of [`PeerStatus`]; `/v1/policies` → list of
//! [`PolicyStatus`]; `/v1/events` → list of [`DenyEvent`] (newest last); `/v1/keys` → [`RotationStatus`];
//! `/v1/dump` → free-form JSON of snapshot and desired state.
//!
//! On the control socket only: `POST /v1/sync` → [`Synced`]: every source has been read again. Wait for enforcement
//! by polling `/v1/status` until `generation.enforced >= Synced.generation`. `POST /v1/keys/rotate` → [`Ordered`]:
//! this node goes to its next epoch. `POST /v1/keys/rotate-all` → [`Ordered`]: `spec.rotationEpoch` is raised.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// This node's name.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// How far the state of the sources has got.
    pub generation: Generation,
    /// The WireGuard devices.
    pub devices: Vec<DeviceStatus>,
    /// The peers, by name.
    pub peers: Vec<PeerStatus>,
    /// The sources of state.
    pub sources: Vec<SourceStatus>,
    /// The reconcilers, in the order they run.
    pub reconcilers: Vec<ReconcilerStatus>,
    /// Pods with an interface on this node.
    pub endpoints: Vec<EndpointStatus>,
    /// What is wrong, worst first.
    pub issues: Vec<Issue>,
    /// This node's keys, and how far their rotation is.
    #[serde(default)]
    pub rotation: RotationStatus,
    /// Why nodes' announcements are believed: `admission`, or `trust-on-first-use`.
    #[serde(default)]
    pub announcement_trust: String,
}

/// Snapshot numbers. They grow, and start anew when the agent does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    /// The newest snapshot of the sources.
    pub snapshot: u64,
    /// The newest snapshot that every reconciler has carried out without an error.
    pub enforced: u64,
    /// The newest snapshot whose policy is live in the kernel.
    pub policy: u64,
}

/// One WireGuard device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// Interface name.
    pub name: String,
    /// `userspace` or `kernel`.
    pub kind: String,
    /// `up`, `down` (link there but not up) or `absent` (no link, or nobody answers the UAPI socket).
    pub state: String,
    /// Base64.
    pub public_key: Option<String>,
    /// UDP port.
    pub listen_port: u16,
    /// Link MTU, bytes.
    pub mtu: u32,
    /// Version of the userspace datapath, or the kernel's release; empty when unknown.
    #[serde(default)]
    pub version: String,
    /// Who does the protocol: `mesh-noise`, `kernel`; empty when unknown.
    #[serde(default)]
    pub core: String,
    /// Who seals and opens packets: `ring`, `avx512`; empty when unknown.
    #[serde(default)]
    pub crypto: String,
    /// Many packets at once: `tun_tso`, `tun_uso`, `udp_gso`, `udp_gro`, and for each `on`, `off` or why not.
    #[serde(default)]
    pub offloads: BTreeMap<String, String>,
    /// Packets dropped, by reason, those that never happened included; empty when not counted.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
}

/// How a peer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// A handshake within the last 180 s (WireGuard's REJECT_AFTER_TIME).
    Up,
    /// No recent handshake and nothing to send: no traffic is not a fault.
    Idle,
    /// We send and no handshake completes.
    Down,
    /// Not programmed yet.
    Unknown,
}

/// One peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// The Node's name.
    pub name: String,
    /// Base64.
    pub public_key: String,
    /// Device that packets to it leave by.
    pub device: String,
    /// Devices it is a peer on: two while keys change. Counters are sums over them.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Where it is reached now.
    pub endpoint: Option<SocketAddr>,
    /// What it owns.
    pub allowed_ips: Vec<IpNet>,
    /// Up, idle, down or unknown.
    pub state: PeerState,
    /// Seconds since the last handshake; none yet is absent.
    pub handshake_age_seconds: Option<u64>,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Datagrams received; none when not counted.
    #[serde(default)]
    pub rx_packets: Option<u64>,
    /// Datagrams sent; none when not counted.
    #[serde(default)]
    pub tx_packets: Option<u64>,
    /// Handshakes completed; none when not counted.
    #[serde(default)]
    pub handshakes: Option<u64>,
    /// Handshake initiations sent, retries included; none when not counted.
    #[serde(default)]
    pub initiations: Option<u64>,
    /// Packets of or for it that were dropped, by reason.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
    /// How often the agent tried to reach it afresh since it started, because it did not answer.
    #[serde(default)]
    pub heals: u64,
    /// Seconds since which it does not answer, while the agent tries to reach it.
    #[serde(default)]
    pub silent_seconds: Option<u64>,
    /// MTU towards it, bytes.
    pub mtu: u32,
}

/// One source of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// `directory`, `cni`, `local` …
    pub name: String,
    /// It has been read in full once; nothing is pruned before all are.
    pub synced: bool,
    /// Objects it holds.
    pub objects: usize,
}

/// One reconciler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReconcilerStatus {
    /// `links`, `addresses`, `routes`, `rules`, `sysctls`, `wireguard`, `masquerade`, `policy`, `leftovers`.
    pub name: String,
    /// `pending`, `done` or `error`.
    pub state: String,
    /// Newest generation it has carried out.
    pub generation: u64,
    /// Changes it has made since start, repairs included.
    pub operations: u64,
    /// The last error, while in state `error`.
    pub error: Option<String>,
}

/// One local pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// `namespace/name`.
    pub pod: String,
    /// Host-side interface.
    pub interface: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// `closed` (pod object not known yet), `open` (no policy selects it) or `policed`.
    pub policy: String,
}

/// Something wrong, on an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Issue {
    /// `Node/b`, `NetworkPolicy/ns/name`, `file nodes/x.yaml`, `device margay0` …
    pub object: String,
    /// The field at fault, as a path, or empty.
    pub field: String,
    /// A CamelCase word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// One policy and what it does here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// `NetworkPolicy`.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Local pods it selects, `namespace/name`.
    pub selects: Vec<String>,
    /// `Ingress`, `Egress`.
    pub policy_types: Vec<String>,
    /// Snapshot generation whose version of it is live here.
    pub enforced: u64,
    /// Why it is not enforced as written, if so (it then fails closed).
    pub issue: Option<String>,
}

/// A packet that policy dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DenyEvent {
    /// Unix time, milliseconds.
    pub time_ms: u64,
    /// The local pod, `namespace/name`, or the device.
    pub endpoint: String,
    /// `ingress` (to the pod) or `egress` (from it).
    pub direction: String,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, or a number.
    pub protocol: String,
    /// Source port, 0 if none.
    pub src_port: u16,
    /// Destination port, 0 if none.
    pub dst_port: u16,
    /// A CamelCase word: DefaultDeny, Spoofed, Closed …
    pub reason: String,
    /// The policies that isolate the endpoint, `namespace/name`.
    pub policies: Vec<String>,
}

/// This node's keys, and how far their rotation is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RotationStatus {
    /// `starting` (no key yet), `steady` (one key), `preparing`, `moving` (peers are moved to the new key) or
    /// `leaving` (the old key only receives).
    pub phase: String,
    /// The keys, newest epoch first.
    pub keys: Vec<KeyStatus>,
    /// Seconds since the newest epoch began here.
    pub age_seconds: Option<u64>,
    /// `spec.rotationEpoch` of the MeshConfiguration: every node goes at least so far.
    pub rotation_epoch: u64,
    /// Seconds until the next epoch is due by `spec.rotation.interval`; none without one.
    pub due_seconds: Option<u64>,
    /// Rotations completed since the agent started.
    pub completed: u64,
    /// Peers that the rotation waits for.
    pub waiting: Vec<WaitingPeer>,
    /// Why the next epoch does not begin though it is asked for; none while nothing is in the way.
    pub blocked: Option<Blocked>,
    /// Devices and routes are as the present phase wants them.
    pub settled: bool,
}

/// One key of this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyStatus {
    /// Its epoch.
    pub epoch: u64,
    /// Base64.
    pub public_key: String,
    /// The device it is in.
    pub device: String,
    /// The device's UDP port.
    pub port: u16,
    /// The others are told of it. An old key that they are not told of receives, and does not send.
    pub announced: bool,
    /// Handshakes with it need a preshared key.
    pub preshared: bool,
}

/// A peer that a rotation waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WaitingPeer {
    /// The Node's name.
    pub name: String,
    /// `NotBegun`, `NoHandshake` or `NotMoved`.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// Why an epoch does not begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Blocked {
    /// `NoDevice` or `NoSecret`.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// Answer of `POST /v1/keys/rotate` and `/v1/keys/rotate-all`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ordered {
    /// The epoch that was asked for.
    pub epoch: u64,
    /// The manifest that says so now; none when only this node was asked.
    #[serde(default)]
    pub file: Option<String>,
    /// Why it does not begin yet.
    #[serde(default)]
    pub blocked: Option<Blocked>,
}

/// Answer of `POST /v1/nodes/NAME/trust`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trusted {
    /// The node.
    pub node: String,
    /// The key that its announcement is signed with now, base64 of an Ed25519 public key.
    pub key: String,
}

/// Answer of `POST /v1/sync`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Synced {
    /// The snapshot that holds everything the sources had when the call came in.
    pub generation: u64,
}

/// Body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiError {
    /// One sentence.
    pub error: String,
}
