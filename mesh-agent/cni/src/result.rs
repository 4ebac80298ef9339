//! ADD's answer in each version's format (specification section 5, "ADD Success").

use std::net::IpAddr;

use mesh_api::cni::Attachment;
use serde_json::{Map, Value, json};

use crate::config::Config;

/// The attachment as the configuration's version words it.
pub(crate) fn added(config: &Config, ifname: &str, netns: &str, given: &Attachment) -> Value {
    if config.at_least("0.3.0") {
        by_interface(config, ifname, netns, given)
    } else {
        by_family(config, given)
    }
}

fn default_route(gateway: &IpAddr) -> Value {
    json!({"dst": if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" }, "gw": gateway})
}

fn gateway_for<'a>(given: &'a Attachment, address: &ipnet::IpNet) -> Option<&'a IpAddr> {
    given.gateways.iter().find(|gateway| gateway.is_ipv4() == address.addr().is_ipv4())
}

/// 0.3.0 and later: a list of interfaces, addresses pointing into it.
fn by_interface(config: &Config, ifname: &str, netns: &str, given: &Attachment) -> Value {
    let mut pod = json!({"name": ifname, "mac": given.pod_mac, "sandbox": netns});
    if config.at_least("1.1.0") {
        pod["mtu"] = json!(given.mtu);
    }
    let ips: Vec<Value> = given
        .addresses
        .iter()
        .map(|address| {
            let mut ip = json!({"address": address, "interface": 1});
            if let Some(gateway) = gateway_for(given, address) {
                ip["gateway"] = json!(gateway);
            }
            if !config.at_least("1.0.0") {
                ip["version"] = json!(if address.addr().is_ipv4() { "4" } else { "6" });
            }
            ip
        })
        .collect();
    json!({
        "cniVersion": config.cni_version,
        "interfaces": [{"name": given.host_interface, "mac": given.host_mac}, pod],
        "ips": ips,
        "routes": given.gateways.iter().map(default_route).collect::<Vec<_>>(),
        "dns": {},
    })
}

/// 0.1.0 and 0.2.0: one address a family.
fn by_family(config: &Config, given: &Attachment) -> Value {
    let mut out = Map::new();
    out.insert("cniVersion".to_owned(), json!(config.cni_version));
    for address in &given.addresses {
        let mut entry = json!({"ip": address});
        if let Some(gateway) = gateway_for(given, address) {
            entry["gateway"] = json!(gateway);
            entry["routes"] = json!([default_route(gateway)]);
        }
        let family = if address.addr().is_ipv4() { "ip4" } else { "ip6" };
        out.entry(family).or_insert(entry);
    }
    out.insert("dns".to_owned(), json!({}));
    Value::Object(out)
}

/// The addresses in a result of any version, for CHECK.
pub(crate) fn addresses(result: &Value) -> Vec<IpAddr> {
    let modern =
        result.get("ips").and_then(Value::as_array).into_iter().flatten().map(|ip| ip.get("address"));
    let old = ["ip4", "ip6"].into_iter().map(|family| result.get(family)?.get("ip"));
    modern.chain(old).filter_map(|text| crate::environment::parse_address(text?.as_str()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment {
            host_interface: "mgy0123456789".to_owned(),
            host_mac: "ee:ee:ee:ee:ee:ee".to_owned(),
            pod_mac: "02:00:00:00:00:01".to_owned(),
            addresses: ["10.244.1.2/32", "fd00:1::2/128"].map(|net| net.parse().unwrap()).to_vec(),
            gateways: ["169.254.1.1", "fe80::1"].map(|ip| ip.parse().unwrap()).to_vec(),
            mtu: 1420,
        }
    }

    fn result(version: &str) -> Value {
        let config = Config::parse(format!(r#"{{"cniVersion":"{version}","name":"m"}}"#).as_bytes()).unwrap();
        added(&config, "eth0", "/run/netns/p", &attachment())
    }

    #[test]
    fn version_1_1_names_interfaces_addresses_routes_and_mtu() {
        assert_eq!(
            result("1.1.0"),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "mgy0123456789", "mac": "ee:ee:ee:ee:ee:ee"},
                    {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/p", "mtu": 1420},
                ],
                "ips": [
                    {"address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1},
                    {"address": "fd00:1::2/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
                "dns": {},
            })
        );
    }

    #[test]
    fn older_versions_get_their_own_words() {
        assert!(result("1.0.0")["interfaces"][1].get("mtu").is_none());
        assert_eq!(result("0.4.0")["ips"][1]["version"], "6");
        let oldest = result("0.2.0");
        assert_eq!(oldest["ip4"]["ip"], "10.244.1.2/32");
        assert_eq!(oldest["ip6"]["routes"][0]["gw"], "fe80::1");
        assert!(oldest.get("interfaces").is_none());
    }

    #[test]
    fn every_format_gives_its_addresses_back() {
        let expected: Vec<IpAddr> = ["10.244.1.2", "fd00:1::2"].map(|ip| ip.parse().unwrap()).to_vec();
        for version in crate::config::SUPPORTED {
            assert_eq!(addresses(&result(version)), expected, "{version}");
        }
        assert!(addresses(&json!({"ips": [{"address": 5}, {}], "ip4": "x"})).is_empty());
    }
}
