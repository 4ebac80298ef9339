//! As much of an IP header as a tunnel needs (RFC 791, RFC 8200).

use std::net::IpAddr;

/// Smallest IPv4 header.
const IPV4_HEADER: usize = 20;
/// The IPv6 header.
const IPV6_HEADER: usize = 40;

/// Source, destination and length of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpPacket {
    /// Where it says it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// Bytes by its header, at most what was there.
    pub length: usize,
}

fn bytes<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..at + N)?.try_into().ok()
}

impl IpPacket {
    /// Reads the header; `None` if it is neither version, or says more bytes than there are or fewer than
    /// the header itself.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (source, destination, length, header) = match packet.first()? >> 4 {
            4 => (
                IpAddr::from(bytes::<4>(packet, 12)?),
                IpAddr::from(bytes::<4>(packet, 16)?),
                usize::from(u16::from_be_bytes(bytes(packet, 2)?)),
                IPV4_HEADER,
            ),
            6 => (
                IpAddr::from(bytes::<16>(packet, 8)?),
                IpAddr::from(bytes::<16>(packet, 24)?),
                IPV6_HEADER + usize::from(u16::from_be_bytes(bytes(packet, 4)?)),
                IPV6_HEADER,
            ),
            _ => return None,
        };
        (header..=packet.len()).contains(&length).then_some(Self { source, destination, length })
    }
}

/// The length to seal a packet of `length` bytes at: a multiple of 16 (WireGuard paper, 5.4.6), but never
/// over the MTU, so that full-sized datagrams stay equal and fit.
pub fn padded_length(length: usize, mtu: usize) -> usize {
    length.next_multiple_of(16).min(mtu).max(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn padding_is_to_16_bytes_and_stops_at_the_mtu() {
        assert_eq!(padded_length(0, 1420), 0);
        assert_eq!(padded_length(1, 1420), 16);
        assert_eq!(padded_length(84, 1420), 96);
        assert_eq!(padded_length(1409, 1420), 1420);
        assert_eq!(padded_length(1420, 1420), 1420);
        assert_eq!(padded_length(1500, 1420), 1500);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let mut packet = [0u8; 28];
        packet[0] = 0x45;
        for (said, fine) in [(19, false), (20, true), (28, true), (29, false)] {
            packet[3] = said;
            assert_eq!(IpPacket::parse(&packet).is_some(), fine, "{said}");
        }
        assert_eq!(IpPacket::parse(&[]), None);
        assert_eq!(IpPacket::parse(&[0x60; 39]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(packet in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(parsed) = IpPacket::parse(&packet) {
                prop_assert!(parsed.length <= packet.len());
                prop_assert_eq!(parsed.source.is_ipv4(), packet[0] >> 4 == 4);
            }
        }
    }
}
