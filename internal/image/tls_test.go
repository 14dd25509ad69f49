package image

import "crypto/tls"

// insecureTLS is for asking a test server whether it is up.
func insecureTLS() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }
