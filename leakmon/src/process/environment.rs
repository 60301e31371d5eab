//! What a process says of itself by OpenTelemetry's environment variables.

use std::fs::File;
use std::io::Read as _;

/// Most bytes of an environment that are looked at. `execve` allows more, which
/// nobody needs.
const MAX_BYTES: u64 = 1 << 20;

/// Most attributes that are kept, and most bytes of each.
const MAX_ATTRIBUTES: usize = 32;
const MAX_VALUE: usize = 256;

/// The service's name and attributes, of OTEL_SERVICE_NAME and
/// OTEL_RESOURCE_ATTRIBUTES (OpenTelemetry specification, resource SDK). Nothing
/// else of the environment is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `service.name`.
    pub service: Option<String>,
    /// The other attributes.
    pub attributes: Vec<(String, String)>,
}

impl Environment {
    /// Of process `pid`, as it was started; empty where it may not be read.
    pub fn of(pid: u32) -> Environment {
        let mut bytes = Vec::new();
        let read = File::open(format!("/proc/{pid}/environ"))
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
        match read {
            Ok(_) => Environment::parse(&bytes),
            Err(_) => Environment::default(),
        }
    }

    /// Of `NAME=VALUE` strings that end with zeros.
    pub fn parse(bytes: &[u8]) -> Environment {
        let value = |name: &str| {
            bytes.split(|b| *b == 0).find_map(|variable| {
                let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
                Some(String::from_utf8_lossy(value).into_owned())
            })
        };
        let mut found = Environment::default();
        let list = value("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        for pair in list.split(',') {
            let Some((key, value)) = pair.split_once('=') else {
                continue;
            };
            let (key, value) = (decode(key.trim()), decode(value.trim()));
            if key.is_empty() {
                continue;
            }
            if key == "service.name" {
                found.service = Some(value);
            } else if found.attributes.len() < MAX_ATTRIBUTES {
                found.attributes.push((key, value));
            }
        }
        // It goes before the attribute.
        let name = value("OTEL_SERVICE_NAME").filter(|name| !name.is_empty());
        if let Some(name) = name {
            found.service = Some(cut(&name));
        }
        found
    }
}

/// Percent-encoded text, as W3C baggage has it.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let digit = |at: usize| char::from(*others.get(at)?).to_digit(16);
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &others[2..];
            }
            _ => {
                bytes.push(first);
                rest = others;
            }
        }
    }
    cut(&String::from_utf8_lossy(&bytes))
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(MAX_VALUE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_and_nothing_else() {
        let parsed = Environment::parse(
            b"SECRET=x\0OTEL_RESOURCE_ATTRIBUTES=service.name=a,k=v%2C%20w,=x,bad,%zz=1\0OTEL_SERVICE_NAME=shop\0",
        );
        assert_eq!(parsed.service.as_deref(), Some("shop"));
        let attributes = [("k", "v, w"), ("%zz", "1")];
        let attributes = attributes.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(parsed.attributes, attributes);
        let parsed = Environment::parse(b"OTEL_RESOURCE_ATTRIBUTES=service.name=a");
        assert_eq!(parsed.service.as_deref(), Some("a"));
        assert_eq!(Environment::parse(b""), Environment::default());
        let long = format!("OTEL_SERVICE_NAME={}", "\u{e9}".repeat(1000));
        let service = Environment::parse(long.as_bytes()).service;
        assert!(service.is_some_and(|service| service.len() <= 256));
    }
}
