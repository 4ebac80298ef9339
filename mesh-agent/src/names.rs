//! Kubernetes' syntax of names and labels (RFC 1123, and `apimachinery/pkg/util/validation` of Kubernetes).

fn is_label_of(text: &str, max: usize, inner: fn(u8) -> bool) -> bool {
    let outer = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= max
        && outer(bytes.first())
        && outer(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || inner(*byte))
}

/// A DNS label: lower-case letters, digits and `-`, at most 63, no `-` at either end (Namespace names).
pub fn is_dns_label(text: &str) -> bool {
    is_label_of(text, 63, |byte| byte == b'-') && !text.bytes().any(|byte| byte.is_ascii_uppercase())
}

/// A DNS subdomain: DNS labels of any length joined by dots, at most 253 (names of Nodes, Pods, policies).
pub fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= 253
        && text.split('.').all(|label| {
            is_label_of(label, 253, |byte| byte == b'-') && !label.bytes().any(|b| b.is_ascii_uppercase())
        })
}

/// A label's value: empty, or at most 63 letters, digits, `-`, `_`, `.` with a letter or digit at both ends.
pub fn is_label_value(text: &str) -> bool {
    text.is_empty() || is_label_of(text, 63, |byte| matches!(byte, b'-' | b'_' | b'.'))
}

/// A label's or annotation's key: a name as in values, with an optional DNS subdomain and `/` before it.
pub fn is_qualified_name(text: &str) -> bool {
    let name = match text.split_once('/') {
        Some((prefix, name)) if is_dns_subdomain(prefix) => name,
        Some(_) => return false,
        None => text,
    };
    !name.is_empty() && is_label_value(name)
}

/// A port's name (RFC 6335 section 5.1): at most 15 lower-case letters, digits and single `-`, not at the
/// ends, with at least one letter.
pub fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && is_dns_label(text)
        && text.bytes().any(|b| b.is_ascii_lowercase())
        && !text.contains("--")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_api_server() {
        let long = "a".repeat(64);
        for good in ["a", "node-1", "n1.example.com", "0", long.as_str()] {
            assert!(is_dns_subdomain(good), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a..b", ".a", "a_b", "a/b", "ä", &"a".repeat(254)] {
            assert!(!is_dns_subdomain(bad), "{bad}");
        }
        assert!(is_dns_label("ns-1") && !is_dns_label("ns.1") && !is_dns_label(&long));
        assert!(
            is_label_value("")
                && is_label_value("A.b_c-d")
                && !is_label_value("-a")
                && !is_label_value(&long)
        );
        for good in ["app", "example.com/App_1", "kubernetes.io/metadata.name"] {
            assert!(is_qualified_name(good), "{good}");
        }
        for bad in ["", "/", "a/", "/a", "a/b/c", "Example.com/a", "a b"] {
            assert!(!is_qualified_name(bad), "{bad}");
        }
        assert!(
            is_port_name("serve-80-tcp")
                && !is_port_name("80")
                && !is_port_name("a--b")
                && !is_port_name("A")
        );
        assert!(!is_port_name("abcdefghijklmnop"));
    }
}
