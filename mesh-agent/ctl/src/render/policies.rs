//! `meshctl policy list`.

use mesh_api::status::PolicyStatus;

use super::{table as new_table, text};

pub(crate) fn table(policies: &[PolicyStatus]) -> String {
    if policies.is_empty() {
        return "no policies".to_owned();
    }
    let mut out = new_table(&["KIND", "NAMESPACE", "NAME", "TYPES", "LOCAL PODS", "ENFORCED", "ISSUE"]);
    for policy in policies {
        out.add_row(vec![
            policy.kind.clone(),
            policy.namespace.clone(),
            policy.name.clone(),
            policy.policy_types.join(","),
            if policy.selects.is_empty() { "-".to_owned() } else { policy.selects.join(",") },
            if policy.enforced == 0 {
                "not yet".to_owned()
            } else {
                format!("generation {}", policy.enforced)
            },
            policy.issue.clone().unwrap_or_default(),
        ]);
    }
    text(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_says_whom_it_selects_and_whether_it_is_live() {
        let policy = PolicyStatus {
            kind: "NetworkPolicy".to_owned(),
            namespace: "x".to_owned(),
            name: "deny".to_owned(),
            selects: vec!["x/a".to_owned(), "x/b".to_owned()],
            policy_types: vec!["Ingress".to_owned()],
            enforced: 7,
            issue: None,
        };
        assert_eq!(
            table(&[policy]),
            "KIND           NAMESPACE  NAME  TYPES    LOCAL PODS  ENFORCED      ISSUE\n\
             NetworkPolicy  x          deny  Ingress  x/a,x/b     generation 7"
        );
    }
}
