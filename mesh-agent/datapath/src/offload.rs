//! Many packets at once over the TUN, as a network card does it: the kernel hands over one large TCP or UDP
//! packet, which `split` cuts; `coalesce` joins what arrived into one that the kernel takes as a whole.
//!
//! `vnet_header` says what a packet needs, `segment` reads one for joining, `checksum` is RFC 1071.

pub mod checksum;
pub mod coalesce;
pub mod segment;
pub mod split;
pub mod vnet_header;

/// The environment's variable that turns offloads off.
pub const VARIABLE: &str = "MARGAY_OFFLOAD";

/// Which offloads to try. What the kernel refuses stays off by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// Large packets over the TUN.
    pub tun: bool,
    /// Many datagrams in one send (UDP_SEGMENT) and one receive (UDP_GRO).
    pub udp: bool,
}

impl Offload {
    /// All of them.
    pub const ALL: Self = Self { tun: true, udp: true };

    /// By the value of [`VARIABLE`]: `on`, `off`, or the name of the one to leave on, `tun` or `udp`.
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "on" => Some(Self::ALL),
            "off" => Some(Self { tun: false, udp: false }),
            "tun" => Some(Self { tun: true, udp: false }),
            "udp" => Some(Self { tun: false, udp: true }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
