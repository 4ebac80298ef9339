//! Ethernet frames as relay and taps need them: addresses, IP lengths, UDP, the ICMP a narrow hop answers with, and
//! IPv4 fragmentation. Every parser takes any bytes and returns an Option.

use std::net::{IpAddr, SocketAddr};

/// Destination MAC address.
pub fn destination(frame: &[u8]) -> Option<[u8; 6]> {
    frame.get(0..6)?.try_into().ok()
}

/// Broadcast or multicast.
pub fn is_group(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 1
}

/// EtherType of an untagged frame.
pub fn ether_type(frame: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?))
}

/// The IP packet in the frame, without padding: None for anything else.
pub fn ip_packet(frame: &[u8]) -> Option<&[u8]> {
    let body = frame.get(14..)?;
    let length = match ether_type(frame)? {
        0x0800 => usize::from(u16::from_be_bytes(body.get(2..4)?.try_into().ok()?)),
        0x86dd => 40 + usize::from(u16::from_be_bytes(body.get(4..6)?.try_into().ok()?)),
        _ => return None,
    };
    body.get(..length)
}

/// Internet checksum (RFC 1071).
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Source, destination and payload of a UDP datagram that is not fragmented and has no IP options.
pub fn udp_of(frame: &[u8]) -> Option<(SocketAddr, SocketAddr, &[u8])> {
    let packet = ip_packet(frame)?;
    let (from, to, udp): (IpAddr, IpAddr, _) = match (packet.first()?, packet.get(6)?, packet.get(9)?) {
        (0x45, flags, 17) if flags & 0x3f == 0 && packet.get(7) == Some(&0) => {
            let address = |at| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            (address(12)?, address(16)?, packet.get(20..)?)
        }
        (first, 17, _) if first >> 4 == 6 => {
            let address = |at| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
            (address(8)?, address(24)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(udp.get(at..at + 2)?.try_into().ok()?));
    Some((SocketAddr::new(from, port(0)?), SocketAddr::new(to, port(2)?), udp.get(8..)?))
}

/// A frame with a UDP datagram, between the Ethernet addresses of the frame `like`; both ends are of one family. `None`
/// if they are not, or if it is longer than a packet can be.
pub fn udp(like: &[u8], from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(8 + payload.len()).ok()?;
    let mut udp = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0; 2]].concat();
    udp.extend(payload);
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
        _ => return None,
    };
    // The pseudo header of RFC 768 and of RFC 8200, 8.1: in both, what else is in it sums up to this.
    let sum = checksum(&[&addresses, &[0, 17], &length.to_be_bytes(), &udp]);
    udp.get_mut(6..8)?.copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    let mut frame = like.get(..12)?.to_vec();
    if from.is_ipv4() {
        let total = length.checked_add(20)?;
        let mut ip = vec![0x45, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        ip.extend(addresses);
        let sum = checksum(&[&ip]);
        ip.get_mut(10..12)?.copy_from_slice(&sum.to_be_bytes());
        frame.extend([8, 0]);
        frame.extend(ip);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([17, 64]);
        frame.extend(addresses);
    }
    frame.extend(udp);
    Some(frame)
}

/// What a hop with this MTU does with a frame that is too big for it.
#[derive(Debug, PartialEq, Eq)]
pub enum TooBig {
    /// IPv4 without DF: pass these on instead.
    Fragments(Vec<Vec<u8>>),
    /// IPv4 with DF, or IPv6: send this back to the sender.
    Icmp(Vec<u8>),
    /// Nothing can be done (malformed, or an ICMP error that must not be answered).
    Drop,
}

/// Judges a frame whose IP packet is longer than `mtu`.
pub fn too_big(frame: &[u8], mtu: u32) -> TooBig {
    let Some(packet) = ip_packet(frame) else { return TooBig::Drop };
    let answer = match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.get(6).is_some_and(|flags| flags & 0x40 == 0) => {
            return fragment(frame, packet, mtu as usize).map_or(TooBig::Drop, TooBig::Fragments);
        }
        Some(4) => fragmentation_needed(packet, mtu),
        Some(6) => packet_too_big(packet, mtu),
        _ => None,
    };
    match (answer, frame.get(0..6), frame.get(6..12), frame.get(12..14)) {
        (Some(answer), Some(to), Some(from), Some(kind)) => TooBig::Icmp([from, to, kind, &answer].concat()),
        _ => TooBig::Drop,
    }
}

/// ICMPv4 type 3 code 4 (RFC 792, RFC 1191), from the packet's destination: only its body counts.
fn fragmentation_needed(packet: &[u8], mtu: u32) -> Option<Vec<u8>> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    if packet.get(9) == Some(&1) && !matches!(packet.get(header), Some(0 | 8)) {
        return None;
    }
    let quoted = packet.get(..packet.len().min(header + 8))?;
    let mut icmp = vec![3, 4, 0, 0, 0, 0];
    icmp.extend(u16::try_from(mtu).ok()?.to_be_bytes());
    icmp.extend(quoted);
    let sum = checksum(&[&icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = u16::try_from(20 + icmp.len()).ok()?;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 1, 0, 0]);
    ip.extend(packet.get(16..20)?);
    ip.extend(packet.get(12..16)?);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip.extend(icmp);
    Some(ip)
}

/// ICMPv6 type 2 (RFC 4443 section 3.2).
fn packet_too_big(packet: &[u8], mtu: u32) -> Option<Vec<u8>> {
    if packet.get(6) == Some(&58) && packet.get(40).is_some_and(|kind| *kind < 128) {
        return None;
    }
    let quoted = packet.get(..packet.len().min(1232))?;
    let mut icmp = vec![2, 0, 0, 0];
    icmp.extend(mtu.to_be_bytes());
    icmp.extend(quoted);
    let length = u16::try_from(icmp.len()).ok()?;
    let (from, to) = (packet.get(24..40)?, packet.get(8..24)?);
    let sum = checksum(&[from, to, &u32::from(length).to_be_bytes(), &[0, 0, 0, 58], &icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([58, 64]);
    ip.extend(from);
    ip.extend(to);
    ip.extend(icmp);
    Some(ip)
}

/// IPv4 fragmentation (RFC 791 section 3.2), options copied to every fragment.
fn fragment(frame: &[u8], packet: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    let header_length = usize::from(packet.first()? & 0xf) * 4;
    let (header, body) = packet.split_at_checked(header_length)?;
    let step = mtu.checked_sub(header_length)? / 8 * 8;
    if step == 0 || header_length < 20 {
        return None;
    }
    let old = u16::from_be_bytes([*header.get(6)?, *header.get(7)?]);
    let (more_after, start) = (old & 0x2000, old & 0x1fff);
    let count = body.len().div_ceil(step);
    let mut fragments = Vec::with_capacity(count);
    for (index, part) in body.chunks(step).enumerate() {
        let more = if index + 1 < count { 0x2000 } else { more_after };
        let offset = start + u16::try_from(index * step / 8).ok()?;
        let mut fragment = frame.get(..14)?.to_vec();
        fragment.extend(header);
        fragment.extend(part);
        let ip = &mut fragment[14..];
        ip[2..4].copy_from_slice(&u16::try_from(header_length + part.len()).ok()?.to_be_bytes());
        ip[6..8].copy_from_slice(&(more | offset).to_be_bytes());
        ip[10..12].fill(0);
        let sum = checksum(&[&ip[..header_length]]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        fragments.push(fragment);
    }
    Some(fragments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(df: bool, body: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        let mut ip = vec![0x45, 0];
        ip.extend(((20 + body) as u16).to_be_bytes());
        ip.extend([1, 2, if df { 0x40 } else { 0 }, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip.extend((0..body).map(|n| n as u8));
        frame.extend(ip);
        frame
    }

    #[test]
    fn fragments_hold_the_whole_body_and_fit() {
        let frame = v4(false, 3001);
        let TooBig::Fragments(parts) = too_big(&frame, 1000) else { panic!("fragments expected") };
        let mut body: Vec<u8> = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let ip = ip_packet(part).unwrap();
            assert!(ip.len() <= 1000);
            assert_eq!(checksum(&[&ip[..20]]), 0);
            let field = u16::from_be_bytes([ip[6], ip[7]]);
            assert_eq!(usize::from(field & 0x1fff) * 8, body.len());
            assert_eq!(field & 0x2000 != 0, index + 1 < parts.len());
            body.extend(&ip[20..]);
        }
        assert_eq!(body, frame[34..]);
    }

    #[test]
    fn df_gets_fragmentation_needed_with_the_mtu_and_the_sender_back() {
        let TooBig::Icmp(answer) = too_big(&v4(true, 1480), 1300) else { panic!("ICMP expected") };
        let ip = ip_packet(&answer).unwrap();
        assert_eq!((&ip[12..16], &ip[16..20]), (&[10, 0, 0, 2][..], &[10, 0, 0, 1][..]));
        assert_eq!((ip[20], ip[21], u16::from_be_bytes([ip[26], ip[27]])), (3, 4, 1300));
        assert_eq!((checksum(&[&ip[..20]]), checksum(&[&ip[20..]])), (0, 0));
    }

    #[test]
    fn a_datagram_reads_as_it_was_made_and_its_sums_are_right() {
        for (from, to) in [("192.0.2.1:7", "192.0.2.2:9"), ("[2001:db8::1]:7", "[2001:db8::2]:9")] {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            for payload in [&b""[..], b"x", b"four", &[0xff; 1400]] {
                let frame = udp(&[2; 14], from, to, payload).unwrap();
                assert_eq!(udp_of(&frame), Some((from, to, payload)));
                let ip = ip_packet(&frame).unwrap();
                let (addresses, udp) = if from.is_ipv4() { (12..20, 20) } else { (8..40, 40) };
                let length = (8 + payload.len()) as u16;
                assert_eq!(checksum(&[&ip[addresses], &[0, 17], &length.to_be_bytes(), &ip[udp..]]), 0);
                assert!(from.is_ipv6() || checksum(&[&ip[..20]]) == 0);
            }
        }
        let mixed = udp(&[2; 14], "192.0.2.1:7".parse().unwrap(), "[::1]:9".parse().unwrap(), b"");
        assert_eq!(mixed, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), mtu in 0u32..2000) {
            let _ = too_big(&bytes, mtu);
            let _ = destination(&bytes).map(is_group);
            let _ = udp_of(&bytes);
        }
    }
}
