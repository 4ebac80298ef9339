//! What a frame on the underlay is.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::wire::frame::{ether_type, ip_packet};

/// Kind of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Class {
    /// UDP from and to a port of the mesh.
    Mesh,
    /// ARP, IPv6 neighbour discovery, or the kernel's membership report for a group that it makes a node join for
    /// that: solicited-node groups (RFC 4861 section 7.2.1) and, once it forwards, all-routers (RFC 4291 section
    /// 2.8). The reports hold group addresses and nothing else.
    Neighbour,
    /// Anything else, described.
    Stranger(String),
}

/// Classifies a frame; `ports` are the mesh's.
pub fn classify(frame: &[u8], ports: &[u16]) -> Class {
    let found = match ether_type(frame) {
        Some(0x0806) => Some(Class::Neighbour),
        Some(0x0800) => ipv4(frame, ports),
        Some(0x86dd) => ipv6(frame, ports),
        _ => None,
    };
    found.unwrap_or_else(|| Class::Stranger(describe(frame)))
}

fn mesh(udp: &[u8], ports: &[u16]) -> Option<Class> {
    let port = |at: usize| Some(u16::from_be_bytes(udp.get(at..at + 2)?.try_into().ok()?));
    (ports.contains(&port(0)?) && ports.contains(&port(2)?)).then_some(Class::Mesh)
}

fn ipv4(frame: &[u8], ports: &[u16]) -> Option<Class> {
    let packet = ip_packet(frame)?;
    let header = usize::from(packet.first()? & 0xf) * 4;
    let later_fragment = u16::from_be_bytes([*packet.get(6)? & 0x1f, *packet.get(7)?]) != 0;
    if *packet.get(9)? != 17 || later_fragment {
        return None;
    }
    mesh(packet.get(header..)?, ports)
}

fn ipv6(frame: &[u8], ports: &[u16]) -> Option<Class> {
    let packet = ip_packet(frame)?;
    let body = packet.get(40..)?;
    match *packet.get(6)? {
        17 => mesh(body, ports),
        58 => (133..=137).contains(body.first()?).then_some(Class::Neighbour),
        // Hop-by-hop options (a router alert) and then ICMPv6: a multicast listener report.
        0 if *body.first()? == 58 => {
            let icmp = body.get(8 + usize::from(*body.get(1)?) * 8..)?;
            membership(icmp).then_some(Class::Neighbour)
        }
        _ => None,
    }
}

/// An MLD report (RFC 2710, RFC 3810) that names solicited-node and all-routers groups only.
fn membership(icmp: &[u8]) -> bool {
    let solicited = |group: Option<&[u8]>| {
        let Some(group) = group.and_then(|group| <[u8; 16]>::try_from(group).ok()) else { return false };
        let group = Ipv6Addr::from(group).segments();
        matches!(
            group,
            [0xff02, 0, 0, 0, 0, 1, 0xff00..=0xffff, _] | [0xff01 | 0xff02 | 0xff05, 0, 0, 0, 0, 0, 0, 2]
        )
    };
    match icmp.first() {
        Some(131 | 132) => solicited(icmp.get(8..24)),
        Some(143) => {
            let count = icmp.get(6..8).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            let mut records = icmp.get(8..).unwrap_or_default();
            for _ in 0..count {
                if !solicited(records.get(4..20)) {
                    return false;
                }
                let sources = records.get(2..4).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
                let words = records.get(1).copied().unwrap_or(0);
                records = records
                    .get(20 + usize::from(sources) * 16 + usize::from(words) * 4..)
                    .unwrap_or_default();
            }
            true
        }
        _ => false,
    }
}

fn describe(frame: &[u8]) -> String {
    let start: String = frame.iter().skip(14).take(64).map(|byte| format!("{byte:02x}")).collect();
    let address = |at: usize, v4: bool| -> Option<String> {
        Some(if v4 {
            Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?).to_string()
        } else {
            Ipv6Addr::from(<[u8; 16]>::try_from(frame.get(at..at + 16)?).ok()?).to_string()
        })
    };
    let ends = match ether_type(frame) {
        Some(0x0800) => address(26, true).zip(address(30, true)).zip(frame.get(23)),
        Some(0x86dd) => address(22, false).zip(address(38, false)).zip(frame.get(20)),
        _ => None,
    };
    match ends {
        Some(((from, to), protocol)) => {
            format!("{from} to {to}, IP protocol {protocol}, {} bytes: {start}", frame.len())
        }
        None => format!("EtherType {:#06x}, {} bytes: {start}", ether_type(frame).unwrap_or(0), frame.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v6(next: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((body.len() as u16).to_be_bytes());
        frame.extend([next, 255]);
        frame.extend([0xfe; 32]);
        frame.extend(body);
        frame
    }

    fn report(group: [u8; 16]) -> Vec<u8> {
        let mut body = vec![58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0];
        body.extend(group);
        v6(0, &body)
    }

    #[test]
    fn only_the_meshs_port_is_the_meshs() {
        let udp =
            |from: u16, to: u16| v6(17, &[from.to_be_bytes(), to.to_be_bytes(), [0, 8], [0, 0]].concat());
        assert_eq!(classify(&udp(51820, 51820), &[51820]), Class::Mesh);
        assert!(matches!(classify(&udp(51820, 53), &[51820]), Class::Stranger(_)));
        assert!(matches!(classify(&udp(53, 51820), &[51820]), Class::Stranger(_)));
    }

    #[test]
    fn neighbour_discovery_and_its_groups_are_house_keeping_and_other_groups_are_not() {
        assert_eq!(classify(&v6(58, &[135, 0, 0, 0]), &[]), Class::Neighbour);
        assert!(matches!(classify(&v6(58, &[128, 0, 0, 0]), &[]), Class::Stranger(_)));
        let mut group = [0; 16];
        group[..2].copy_from_slice(&[0xff, 0x02]);
        group[11..13].copy_from_slice(&[1, 0xff]);
        assert_eq!(classify(&report(group), &[]), Class::Neighbour);
        group[11..].copy_from_slice(&[0, 0, 0, 0, 2]);
        assert_eq!(classify(&report(group), &[]), Class::Neighbour);
        group[15] = 0xfb; // mDNS
        assert!(matches!(classify(&report(group), &[]), Class::Stranger(_)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..150), kind in 0usize..3) {
            if let Some(slot) = bytes.get_mut(12..14) {
                slot.copy_from_slice(&[[8, 0], [0x86, 0xdd], [8, 6]][kind]);
            }
            let _ = classify(&bytes, &[51820]);
        }
    }
}
