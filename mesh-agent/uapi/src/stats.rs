//! What mesh-datapath counts beyond the UAPI's bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use keyservice::PublicKey;

/// A reply to `get=stats`. Names are the datapath's (`mesh_datapath::counters`), so that a newer datapath
/// can count more without an older reader breaking. What an older datapath does not tell is empty or 0.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Version of the datapath that answered.
    pub version: String,
    /// The tunnel's MTU in bytes, as the datapath last saw it.
    pub mtu: u32,
    /// Who does the protocol: `mesh-noise`, `boringtun`.
    pub core: String,
    /// Who seals and opens: `ring`, `avx512` and such; `null` in benches that leave it out.
    pub crypto: String,
    /// Many packets at once, by where: see [`offload`].
    pub offloads: BTreeMap<String, Offload>,
    /// Packets dropped, by reason, for the whole device.
    pub drops: BTreeMap<String, u64>,
    /// The peers that have sent, received or lost anything.
    pub peers: BTreeMap<PublicKey, PeerStats>,
}

/// Names of the offloads in [`Stats::offloads`].
pub mod offload {
    /// Large TCP packets over the TUN (IFF_VNET_HDR, TUN_F_TSO4 and 6).
    pub const TUN_TSO: &str = "tun_tso";
    /// Large UDP packets over the TUN (TUN_F_USO4 and 6).
    pub const TUN_USO: &str = "tun_uso";
    /// Many datagrams in one send (UDP_SEGMENT).
    pub const UDP_GSO: &str = "udp_gso";
    /// Many datagrams in one receive (UDP_GRO).
    pub const UDP_GRO: &str = "udp_gro";
}

/// One peer's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerStats {
    /// Authentic datagrams received: data, keepalives and handshakes.
    pub rx_packets: u64,
    /// Datagrams sent: data, keepalives and handshakes.
    pub tx_packets: u64,
    /// Handshakes completed, whoever began them.
    pub handshakes: u64,
    /// Handshake initiations sent, each retry counted.
    pub initiations: u64,
    /// Packets dropped, by reason, where the peer is known.
    pub drops: BTreeMap<String, u64>,
}

/// Whether an offload is in use, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offload {
    /// In use: `on`.
    On,
    /// Not tried, because a switch says so: `off`.
    Off,
    /// The kernel or the network card refused, with this errno: `refused 5`.
    Refused(i32),
    /// In use for packets shorter than so many bytes; longer ones were refused with this errno: `below 1432 22`.
    Below(u32, i32),
    /// What a newer datapath says, as it says it.
    Other(String),
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off => f.write_str("off"),
            Self::Refused(errno) => write!(f, "refused {errno}"),
            Self::Below(bytes, errno) => write!(f, "below {bytes} {errno}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl FromStr for Offload {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let words: Vec<&str> = text.split(' ').collect();
        let known = match words.as_slice() {
            ["on"] => Some(Self::On),
            ["off"] => Some(Self::Off),
            ["refused", errno] => errno.parse().ok().map(Self::Refused),
            ["below", bytes, errno] => {
                bytes.parse().ok().zip(errno.parse().ok()).map(|(bytes, errno)| Self::Below(bytes, errno))
            }
            _ => None,
        };
        // Numbers have more than one spelling; what is kept must be said again as it was.
        Ok(known.filter(|known| known.to_string() == text).unwrap_or_else(|| Self::Other(text.to_owned())))
    }
}
