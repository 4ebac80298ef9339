//! Addresses and prefixes as text.

use std::net::IpAddr;

use ipnet::IpNet;

/// Parses a prefix with the API server's rules for existing fields, so `10.0.0.1/8` means 10.0.0.0/8; the
/// flag says that host bits were cut off.
pub fn prefix(text: &str) -> Result<(IpNet, bool), String> {
    let net: IpNet = text.parse().map_err(|_| format!("{text:?} is not a CIDR"))?;
    if let IpAddr::V6(v6) = net.addr()
        && v6.to_ipv4_mapped().is_some()
    {
        return Err(format!("{text:?} is an IPv4-mapped IPv6 prefix"));
    }
    let trunc = net.trunc();
    Ok((trunc, trunc != net))
}

/// Parses an address.
pub fn address(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| format!("{text:?} is not an IP address"))?;
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("{text:?} is an IPv4-mapped IPv6 address"))
        }
        ip if ip.is_unspecified() => Err(format!("{text:?} is the unspecified address")),
        ip => Ok(ip),
    }
}
